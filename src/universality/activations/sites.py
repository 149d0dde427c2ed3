"""Which sites of a model the store holds, by name alone: the workflow is planned without loading any model."""

# Sites that make up a layer's neurons in each family, and how many times the width of the residual stream they have.
_MLP = {"mlp.{layer}.post": 4}
_MIXER = {"mamba.{layer}.ssm_in": 2, "mamba.{layer}.gate": 2}
_NEURONS = {
    "gpt_neox": _MLP,
    "gpt2": _MLP,
    "llama": _MLP,
    "rwkv": _MLP,
    "falcon_h1": {"mlp.{layer}.post": 2},
    "mamba": _MIXER,
    "mamba2": _MIXER,
}


def residual_site(layer: int) -> str:
    """The residual stream after a block."""
    return f"resid_post.{layer}"


def site_of_layer(kind: str, layer: int) -> str:
    """The site of a kind in a layer: resid_mid is resid_mid.3, mlp.out is mlp.3.out."""
    first, _, rest = kind.partition(".")
    return f"{first}.{layer}.{rest}" if rest else f"{first}.{layer}"


def neuron_sites(family: str, layer: int) -> list[str]:
    """The sites of one layer that make up its neurons, for the neuron baseline."""
    return [site.format(layer=layer) for site in _NEURONS[family]]


def layer_of(site: str) -> int:
    return int(site.split(".")[1])


def site_width(family: str, site: str, d_model: int) -> int:
    """Values a token at one of the sites above, in a model of the family's usual proportions."""
    kinds = {name.format(layer=layer_of(site)): times for name, times in _NEURONS[family].items()}
    return kinds.get(site, 1) * d_model
