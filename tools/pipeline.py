"""A trained model behind the interface of diffusers' pipelines, which needs diffusers (pip install diffusers).

The folder is that of tools/hub.py:

from tools.pipeline import SpectralJiTPipeline
pipe = SpectralJiTPipeline.from_pretrained("output/demo/hub")       # or "user/name"
image = pipe(class_labels=[3, 1, 4], num_inference_steps=20, guidance_scale=1.5).images[0]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from tools.hub import SpectralJiT
from util.evaluation.images import to_pil


class SpectralJiTPipeline(DiffusionPipeline):
    """From classes to images. The model is its only component: the solver and the input operator are the model's own.

    It has no model_index.json, so that DiffusionPipeline.from_pretrained does not load it: this class does.
    """

    def __init__(self, model: SpectralJiT):
        super().__init__()
        self.register_modules(model=model)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> "SpectralJiTPipeline":
        """Load a folder, or the model user/name of the hub, as SpectralJiT.from_pretrained does."""
        return cls(SpectralJiT.from_pretrained(name, **kwargs))

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> str | None:
        """Write the folder of the model, as SpectralJiT.save_pretrained does."""
        return self.model.save_pretrained(folder, **kwargs)

    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> ImagePipelineOutput:
        """Return a PIL image for each of the classes.

        Args:
            num_inference_steps: steps of the solver (default: the model's own).
            guidance_scale: 1 is none (default: the model's own).
            generator: the seed of the images is drawn from it (default: from torch's).
            settings: of SpectralJiT.sample.

        Raises:
            UserError: labels or settings that the model does not have.
        """
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=device))
        given = {"num_sampling_steps": num_inference_steps, "cfg": guidance_scale}
        settings |= {name: value for name, value in given.items() if value is not None}
        return ImagePipelineOutput([to_pil(image) for image in self.model.sample(class_labels, seed, **settings)])
