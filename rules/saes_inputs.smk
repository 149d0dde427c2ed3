# What jobs of dictionaries read and are told: which they train or measure, on which shards or models.


def trained_in(jobs, wildcards):
    """The dictionaries that a job of the rule trains."""
    return jobs.members or [plan.dictionary(wildcards.dictionary)]


def tokens_of_all(dictionaries):
    """The tokens that all models of the dictionaries run on: those of a crosscoder share a tokenizer."""
    [tokens] = {plan.tokens_of(model) for d in dictionaries for model in d.models}
    return tokens


def dictionary_inputs(jobs):
    """Input function: the shards of a job's sites, or the models and tokens to run them on."""

    def inputs(wildcards):
        first = trained_in(jobs, wildcards)[0]
        if study.activations.train == "stream":
            return {
                "models": [f"results/models/{model}" for model in first.models],
                "tokens": tokens_of_all([first]),
            }
        return {
            "activations": [
                shard
                for source in first.sources
                for shard in plan.shards(*source, "train")
            ]
        }

    return inputs


def source_flags(sources):
    return [f"--source {model}:{site}" for model, site in sources]


def dictionary_flags(jobs):
    """Parameter function: what a job trains on, every input behind its flag."""

    def flags(wildcards, input):
        sources = source_flags(trained_in(jobs, wildcards)[0].sources)
        if study.activations.train == "stream":
            models = [f"--stream-model {model}" for model in input.models]
            return [*sources, *models, f"--tokens {input.tokens}"]
        return sources + [f"--activations {shard}" for shard in input.activations]

    return flags


def dictionary_settings(jobs):
    """Parameter function: what is trained and how; what is streamed only where it is."""

    def settings(wildcards):
        wanted = [
            {"variant": d.variant.model_dump(mode="json"), "seed": d.seed}
            for d in trained_in(jobs, wildcards)
        ]
        settings = {"saes": wanted, "training": study.saes.training}
        if study.activations.train == "stream":
            settings["stream"] = study.activations.stream
        return as_json(**settings)

    return settings


def evaluated(wildcards):
    """The dictionaries that an evaluation measures."""
    return plan.evaluated(wildcards.get("evaluation") or wildcards.crosscoder)


def evaluated_saes(wildcards):
    return [f"results/saes/{dictionary.path}" for dictionary in evaluated(wildcards)]


def evaluated_shards(wildcards):
    sources = {
        source for dictionary in evaluated(wildcards) for source in dictionary.sources
    }
    return [
        shard
        for source in sorted(sources)
        for shard in plan.shards(*source, "evaluation")
    ]


def evaluated_models(wildcards):
    models = {m for dictionary in evaluated(wildcards) for m in dictionary.models}
    return [f"results/models/{model}" for model in sorted(models)]


def evaluation_flags(wildcards, input):
    """Every input of an evaluation behind its flag."""
    names = {
        "--sae": input.saes,
        "--activations": input.activations,
        "--model": input.models,
    }
    return [f"{flag} {path}" for flag, paths in names.items() for path in paths]


def evaluation_settings(wildcards):
    """Whose dictionaries they are, how they are measured, and what the models run on."""
    saes = [
        {
            "sources": [f"{model}:{site}" for model, site in d.sources],
            "variant": d.name,
            "seed": d.seed,
        }
        for d in evaluated(wildcards)
    ]
    return as_json(saes=saes, evaluation=study.saes.evaluation, run=model_run())
