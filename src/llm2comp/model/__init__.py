"""What an encoder is: tokens, memory, backbone, compressor, its module, encoders that need no
training.
"""
