"""A batch on its way to the model: what it holds, whether that is sound, and how it is cut."""
