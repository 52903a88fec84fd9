"""Train a student against its teacher."""
