# Sparse codes of the evaluation tokens, a job an SAE.


localrules:
    all_features,


rule all_features:
    input:
        [f"results/features/{features.path}" for features in plan.feature_sets()],


rule features:
    input:
        activations=evaluation_shards,
        sae="results/saes/{model}/{variant}/seed_{seed}/layer_{layer}",
    output:
        directory("results/features/{model}/{variant}/seed_{seed}/layer_{layer}"),
    log:
        "logs/features/{model}/{variant}/seed_{seed}/layer_{layer}.log",
    benchmark:
        "logs/features/{model}/{variant}/seed_{seed}/layer_{layer}.tsv"
    threads: study.features.threads
    params:
        activations=lambda wildcards, input: [
            f"--activations {shard}" for shard in input.activations
        ],
        settings=section(study.features),
        threads=study.features.threads,
        code=code("features"),
    shell:
        "universality features encode {params.activations} --model {wildcards.model} --site resid_post.{wildcards.layer}"
        " --sae {input.sae} --settings {params.settings:q}"
        " --out {output} --threads {params.threads} --log {log}"
