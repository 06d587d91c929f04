"""Layer 0: declarations of parameters, products with weights, logical axes and meshes. Imports no other package."""
