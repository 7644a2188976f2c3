"""How much memory a run needs on each GPU, from configurations alone, and which keys of its recipe make it less."""
