# Values of named sites on a sample of every split, a job a shard. A job runs the model once and fills one folder a site:
# which sites these are follows from the study, so each model and split has a rule of its own.


localrules:
    all_activations,


rule all_activations:
    input:
        plan.cached_shards(),


for cached in plan.cached():

    rule:
        name:
            cached.rule
        input:
            model=f"results/models/{cached.model}",
            tokens=plan.tokens_of(cached.model),
        output:
            [
                directory(
                    f"results/activations/{cached.model}/{site}/{cached.split}/shard_{{shard}}"
                )
                for site in cached.sites
            ],
        log:
            f"logs/activations/{cached.model}/{cached.split}_{{shard}}.log",
        benchmark:
            f"logs/activations/{cached.model}/{cached.split}_{{shard}}.tsv"
        threads: study.activations.threads
        params:
            sites=[f"--site {site}" for site in cached.sites],
            split=cached.split,
            store=store_folder,
            settings=section(study.activations.shard),
            threads=study.activations.threads,
            code=code("activations"),
        shell:
            "universality activations cache --model {input.model} {params.sites} --tokens {input.tokens}"
            " --split {params.split} --shard {wildcards.shard} --settings {params.settings:q}"
            " --out {params.store} --threads {params.threads} --log {log}"
