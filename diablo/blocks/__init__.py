"""DiaBlo itself: block products and their gradients, the layer, and in-place training."""
