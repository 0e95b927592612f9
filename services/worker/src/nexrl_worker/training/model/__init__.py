"""One model: how it is built, what wraps it, where its weights come from and how they leave."""
