"""The passes. One file each; its docstring shows before and after."""
