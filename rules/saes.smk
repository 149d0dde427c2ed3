# One sparse autoencoder for each model, variant, seed and layer that a comparison asks for.


localrules:
    all_saes,


rule all_saes:
    input:
        [f"results/saes/{features.path}" for features in plan.feature_sets()],


rule saes:
    input:
        activations=lambda wildcards: plan.shards(wildcards.model, "train"),
    output:
        directory("results/saes/{model}/{variant}/seed_{seed}/layer_{layer}"),
    log:
        "logs/saes/{model}/{variant}/seed_{seed}/layer_{layer}.log",
    benchmark:
        "logs/saes/{model}/{variant}/seed_{seed}/layer_{layer}.tsv"
    threads: study.saes.threads
    params:
        activations=lambda wildcards, input: [
            f"--activations {shard}" for shard in input.activations
        ],
        settings=lambda wildcards: as_json(
            variant=study.saes.variants[wildcards.variant],
            training=study.saes.training,
        ),
        threads=study.saes.threads,
        code=code("saes"),
    shell:
        "universality saes train {params.activations} --site resid_post.{wildcards.layer}"
        " --model {wildcards.model} --seed {wildcards.seed} --settings {params.settings:q}"
        " --out {output} --threads {params.threads} --log {log}"
