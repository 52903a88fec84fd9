"""What images are drawn by: the largest seed, and short names of schedulers => diffusers' classes. Needs no torch."""

MAX_SEED = 2**62  # what is added to a seed (an image's number, a worker's, 2**32 …) stays below 2**63
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
