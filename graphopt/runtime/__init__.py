"""Engines: what a build gives, called with numpy or torch tensors."""
