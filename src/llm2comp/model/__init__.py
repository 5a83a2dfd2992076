"""What an encoder is: tokens, memory, backbone, compressor, module, training-free encoders."""
