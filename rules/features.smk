# Sparse codes of held-out tokens, a job an SAE and corpus.


localrules:
    all_features,


rule all_features:
    input:
        [f"results/features/{codes.path}" for codes in plan.feature_sets()],


rule features:
    input:
        activations=held_out_shards,
        sae="results/saes/{model}/{variant}/seed_{seed}/layer_{layer}",
    output:
        directory(
            "results/features/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}"
        ),
    log:
        "logs/features/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}.log",
    benchmark:
        "logs/features/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}.tsv"
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
        " --corpus {wildcards.corpus} --sae {input.sae} --settings {params.settings:q}"
        " --out {output} --threads {params.threads} --log {log}"
