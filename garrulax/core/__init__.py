"""Floor 0: Spec trees, products with weight leaves, logical axes and meshes. Imports nothing of Garrulax."""
