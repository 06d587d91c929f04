"""Floor 0: ParamSpec trees, products with weight leaves, logical axes and meshes. Imports nothing of Garrulax."""
