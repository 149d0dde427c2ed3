# Values of named sites on a sample of both splits, a job a shard.


localrules:
    all_activations,


rule all_activations:
    input:
        [plan.shards(model, "train") for model in plan.models_with_features()],
        [plan.shards(model, "evaluation") for model in plan.compared_models()],


rule activations:
    input:
        model="results/models/{model}",
        tokens="results/corpus/tokens",
    output:
        directory("results/activations/{model}/{split}/shard_{shard}"),
    log:
        "logs/activations/{model}/{split}_{shard}.log",
    benchmark:
        "logs/activations/{model}/{split}_{shard}.tsv"
    threads: study.activations.threads
    params:
        layers=lambda wildcards: [
            f"--layer {layer}" for layer in plan.layers(wildcards.model)
        ],
        settings=section(study.activations.cache),
        threads=study.activations.threads,
        code=code("activations"),
    shell:
        "universality activations cache --model {input.model} {params.layers} --tokens {input.tokens}"
        " --split {wildcards.split} --shard {wildcards.shard} --settings {params.settings:q}"
        " --out {output} --threads {params.threads} --log {log}"
