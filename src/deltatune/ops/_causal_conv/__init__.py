"""The depthwise causal convolution over packed documents."""
