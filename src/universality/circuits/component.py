"""What circuits are made of: a site of a model, or one head of it."""

from typing import NamedTuple


class Component(NamedTuple):
    """A site, or one head of it; of a convolution's taps, one tap."""

    site: str
    head: int | None = None

    @property
    def layer(self) -> int:
        """-1 for what stands outside the layers."""
        return int(self.site.split(".")[1]) if "." in self.site else -1

    @property
    def name(self) -> str:
        if "." not in self.site:
            return self.site
        module, _, kind = self.site.split("@")[0].split(".")
        if module == "attn" and self.head is not None:
            return f"L{self.layer}H{self.head}" + (f" {kind}" if kind != "z" else "")
        whole = module == "mlp" or (module == "attn" and kind == "out")  # all heads together
        name = f"L{self.layer} {module if whole else kind}"
        return name if self.head is None else f"{name} {self.head}"


LOGITS = Component("logits")
