# Do the features that both sides of a comparison have carry what a model does? A job for each side.


localrules:
    all_ablation,


rule all_ablation:
    input:
        plan.ablations(),


rule ablation:
    input:
        model=lambda wildcards: f"results/models/{side_of(wildcards).model}",
        saes=lambda wildcards: [
            f"results/saes/{f.path}" for f in plan.side(side_of(wildcards))
        ],
        codes=side_codes,
        comparison="results/alignment/{comparison}",
        tokens=lambda wildcards: plan.tokens_of(side_of(wildcards).model),
        tokenizer=lambda wildcards: plan.tokenizer_of(side_of(wildcards).model),
    output:
        directory("results/ablation/{comparison}/{side}"),
    log:
        "logs/ablation/{comparison}/{side}.log",
    benchmark:
        "logs/ablation/{comparison}/{side}.tsv"
    threads: study.ablation.threads
    params:
        dictionaries=lambda wildcards, input: [
            *(f"--sae {path}" for path in input.saes),
            *(f"--codes {path}" for path in input.codes),
        ],
        settings=ablation_settings,
        threads=study.ablation.threads,
        code=code("ablation"),
    shell:
        "universality ablation measure --model {input.model} {params.dictionaries} --comparison {input.comparison}"
        " --tokens {input.tokens} --tokenizer {input.tokenizer} --settings {params.settings:q}"
        " --out {output} --threads {params.threads} --log {log}"
