"""An image to the tensor that a network was trained on.

transforms.py  the definitions, each for PIL images and for tensors (differentiable)
resizing.py    Pillow's bicubic filter in torch
batches.py     many images, decoded and transformed ahead of the network, bounded by pixels in flight
"""
