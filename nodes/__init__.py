"""The ComfyUI nodes: each turns its inputs into calls of wan_core, and the results into outputs.

``pipeline``, ``lease``, ``job``, ``progress``, ``words`` and ``picture`` do not import ComfyUI.
``bridge`` is the one file that touches ComfyUI's own modules. The others define the nodes, against
``comfy_api.latest``.
"""
