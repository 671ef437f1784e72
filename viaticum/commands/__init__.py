"""The commands of `viaticum`, a module for each group; `viaticum.cli` mounts them."""
