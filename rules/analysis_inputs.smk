# What jobs of circuits, ablation and analysis read and are told.


def task_settings(wildcards):
    """One task, what is told of effects on it, and how they are estimated."""
    return as_json(
        name=wildcards.task,
        task=study.circuits.tasks[wildcards.task],
        measuring=study.circuits.measuring,
        attribution=study.circuits.attribution,
    )


def side_of(wildcards):
    """The side of a comparison that a job is of."""
    return getattr(study.alignment.comparisons[wildcards.comparison], wildcards.side)


def side_codes(wildcards):
    """Its codes, in the order of its layers."""
    corpus = study.alignment.comparisons[wildcards.comparison].corpus
    return [
        f"results/features/{corpus}/{f.path}" for f in plan.side(side_of(wildcards))
    ]


def ablation_settings(wildcards):
    """Which features are ablated, and what is measured on what."""
    return as_json(
        side=wildcards.side,
        layers=plan.layers(side_of(wildcards).model),
        corpus=study.alignment.comparisons[wildcards.comparison].corpus,
        sequences=study.ablation.sequences,
        features=study.ablation.features,
        tasks={
            name: task.model_dump(mode="json")
            for name, task in study.circuits.tasks.items()
        },
        measuring=study.circuits.measuring,
        run=model_run(),
    )


def tokens_of_model(wildcards):
    return plan.tokens_of(wildcards.model)


def held_out(corpus):
    """The sequences of a held-out corpus that activations were cached of."""
    sequences = study.activations.evaluation_sequences
    return {"corpus": corpus, "sequences": sequences, "run": model_run()}


def analysis_features_settings(wildcards):
    """Which contexts are kept of one SAE's features, and how much is measured by truncating them."""
    return as_json(
        layer=int(wildcards.layer),
        held=held_out(wildcards.corpus),
        contexts=study.analysis.contexts,
        truncation=study.analysis.truncation,
    )


def side_analyses(kind, side):
    """Input function: folders of the analysis stage, "features" or "judged", of a side's layers; none of a judge where
    there is none."""

    def folders(wildcards):
        if kind == "judged" and study.analysis.judge is None:
            return []
        comparison = study.alignment.comparisons[wildcards.comparison]
        return [
            f"results/analysis/{kind}/{comparison.corpus}/{f.path}"
            for f in plan.side(getattr(comparison, side))
        ]

    return folders


def analysis_flags(wildcards, input):
    """Those of both sides behind their flags."""
    return [
        f"--{kind}-{side} {path}"
        for kind in ("measures", "judged")
        for side in ("a", "b")
        for path in getattr(input, f"{kind}_{side}")
    ]


def similarity_settings(wildcards):
    """One comparison with all layers of its sides, and how correlations are told."""
    matched = json.loads(match_settings(wildcards))
    return as_json(**matched, against=study.analysis.against)


def idiosyncratic_settings(wildcards):
    """Which features of one side are listed, and what they are ablated in."""
    return as_json(
        side=wildcards.side,
        layers=plan.layers(side_of(wildcards).model),
        held=held_out(study.alignment.comparisons[wildcards.comparison].corpus),
        idiosyncratic=study.analysis.idiosyncratic,
    )
