"""What the configurations of these diffusion models share, for transformers 4.57 and 5."""

from typing import Any, ClassVar

from transformers import PretrainedConfig


class DiffusionConfig(PretrainedConfig):
    """Settings of a diffusion model: ``defaults`` may take any value, ``fixed`` only the one that the code computes.

    Rotary settings are written as ``rope_theta`` and ``rope_scaling``, which both versions read, whatever spelling they
    came in.  A dropout is kept and not applied: these models are for use.  Raises ValueError for a fixed setting with
    another value.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    fixed: ClassVar[dict[str, Any]] = {}

    def __init__(self, **kwargs: Any) -> None:
        for name, wanted in self.fixed.items():
            if (found := kwargs.get(name, wanted)) != wanted:
                raise ValueError(f"{name} is {found!r}; the code beside this configuration computes {wanted!r} alone")
        rope = {**(kwargs.pop("rope_parameters", None) or {}), **(kwargs.pop("rope_scaling", None) or {})}
        rope.setdefault("rope_type", rope.pop("type", "default"))
        kwargs["rope_theta"] = rope.setdefault("rope_theta", kwargs.get("rope_theta", self.defaults["rope_theta"]))
        for name, value in (self.defaults | self.fixed).items():
            setattr(self, name, kwargs.pop(name, value))
        self.rope_parameters = rope
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are written to config.json."""
        values = super().to_dict()
        rope = values.pop("rope_parameters", {})
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        return values
