"""A server on the page's port, and a conversation."""

import doc_machine

doc_machine.sh("viaticum serve --budget 1")
messages = [{"role": "user", "content": "What is 17 * 23?"}]
