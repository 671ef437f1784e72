"""A budget for code that knows nothing of it: calls of OpenAI's and Anthropic's clients, LiteLLM, LangChain.

All of them send HTTP requests through httpx, which is where they are held. The names of use are
`viaticum.budget` (`agents.instrumentation.scope`) and the command `viaticum run`
(`agents.instrumentation.run`).
"""
