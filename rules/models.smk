# One folder in transformers' format for each model: trained here, brought in, or untrained.


localrules:
    all_models,


rule all_models:
    input:
        expand("results/models/{model}", model=plan.models()),


rule models:
    input:
        checkpoint_files,
        like=like_folder,
        tokens=lambda wildcards: plan.tokens_of(wildcards.model),
        tokenizer=lambda wildcards: plan.tokenizer_of(wildcards.model),
    output:
        directory("results/models/{model}"),
    log:
        "logs/models/{model}.log",
    benchmark:
        "logs/models/{model}.tsv"
    threads: model_threads
    params:
        settings=model_settings,
        like=lambda wildcards, input: [f"--like {folder}" for folder in input.like],
        threads=model_threads,
        code=code("models"),
    shell:
        "universality models make --name {wildcards.model} --settings {params.settings:q}"
        " --tokens {input.tokens} --tokenizer {input.tokenizer} {params.like} --out {output}"
        " --checkpoint checkpoints/{wildcards.model}.pt --threads {params.threads} --log {log}"
