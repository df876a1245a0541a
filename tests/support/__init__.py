"""What tests share: small real models, bad files, machines that are not this one, a ComfyUI."""
