"""The environment service, from bare Python to the coalescing client, and side by side with OpenEnv; `__main__.py`."""
