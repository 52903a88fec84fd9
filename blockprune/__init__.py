"""Which blocks of a diffusion U-Net can go, what each one costs in quality, and how to get a good smaller model."""
