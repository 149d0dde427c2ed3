# What jobs of comparisons read and are told: both sides' codes or bases, and the tokens of their rows.


def held_out_shards(wildcards):
    """The shards of a held-out corpus that an SAE encodes."""
    return plan.shards(
        wildcards.model, residual_site(int(wildcards.layer)), wildcards.corpus
    )


def side_values(side, block=None):
    """Input function: what side "a" or "b" compares, in the order of its layers: codes, or shards of a basis. Of all its
    layers, or of the block that the wildcard `block` numbers."""

    def values(wildcards):
        comparison = study.alignment.comparisons[wildcards.comparison]
        chosen = getattr(comparison, side)
        if chosen.basis is not None:
            return plan.basis_shards(chosen, comparison.corpus)
        layers = block_layers(chosen, wildcards[block] if block else None)
        features = [f for f in plan.side(chosen) if f.layer in layers]
        return [f"results/features/{comparison.corpus}/{f.path}" for f in features]

    return values


def side_saes(side):
    """Input function: the SAEs of a side, in the order of its layers."""

    def folders(wildcards):
        chosen = getattr(study.alignment.comparisons[wildcards.comparison], side)
        return [f"results/saes/{features.path}" for features in plan.side(chosen)]

    return folders


def side_residuals(side):
    """Input function: shards of the residual stream after all layers of a side's model."""

    def shards(wildcards):
        comparison = study.alignment.comparisons[wildcards.comparison]
        return plan.residual_shards(getattr(comparison, side).model, comparison.corpus)

    return shards


def block_layers(side, block):
    """The layers of a block, or all."""
    if block is None:
        return plan.layers(side.model)
    return plan.alignment_blocks(side)[int(block)]


def side_rows(side):
    """Input function: shards of the side's model on the comparison's corpus, which tell tokens and documents."""

    def shards(wildcards):
        comparison = study.alignment.comparisons[wildcards.comparison]
        return plan.row_shards(getattr(comparison, side).model, comparison.corpus)

    return shards


def match_settings(wildcards):
    """One comparison with the layers of its sides that a job compares."""
    comparison = study.alignment.comparisons[wildcards.comparison]
    return as_json(
        comparison=comparison,
        layers_a=block_layers(comparison.a, wildcards.get("i")),
        layers_b=block_layers(comparison.b, wildcards.get("j")),
        matching=study.alignment.matching,
    )


def comparison_settings(wildcards):
    """One comparison with all layers of its sides, and what is told of it."""
    matched = json.loads(match_settings(wildcards))
    return as_json(**matched, statistics=study.alignment.statistics)


def spaces_settings(wildcards):
    """The same, and how whole layers are compared."""
    compared = json.loads(comparison_settings(wildcards))
    spaces = study.alignment.spaces.model_copy(update={"comparisons": []})
    return as_json(**compared, spaces=spaces)


def side_flags(wildcards, input):
    """Every input of a comparison behind its flag."""
    names = {
        "--a": input.a,
        "--b": input.b,
        "--rows-a": input.rows_a,
        "--rows-b": input.rows_b,
    }
    return [f"{flag} {path}" for flag, paths in names.items() for path in paths]
