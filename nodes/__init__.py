"""The ComfyUI nodes: each turns its inputs into calls of wan_core and the result into sockets.

``pipeline``, ``lease`` and ``job`` know nothing of ComfyUI; ``bridge`` is the one file that touches
its modules; the others are the nodes, written against ``comfy_api.latest``.
"""
