"""DiaBlo itself: the products with blocks and their gradients, the layer, and training in place."""
