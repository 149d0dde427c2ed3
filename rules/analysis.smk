# What kind of features are shared? A job for each SAE's features, and for each comparison.


localrules:
    all_analysis,


rule all_analysis:
    input:
        plan.analyses(),


rule analysis_features:
    input:
        sae="results/saes/{model}/{variant}/seed_{seed}/layer_{layer}",
        codes="results/features/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}",
        model="results/models/{model}",
        tokens=tokens_of_model,
    output:
        directory(
            "results/analysis/features/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}"
        ),
    log:
        "logs/analysis/features/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}.log",
    benchmark:
        "logs/analysis/features/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}.tsv"
    threads: study.analysis.threads
    params:
        settings=analysis_features_settings,
        threads=study.analysis.threads,
        code=code("analysis"),
    shell:
        "universality analysis features --settings {params.settings:q} --sae {input.sae} --codes {input.codes}"
        " --model {input.model} --tokens {input.tokens} --out {output} --threads {params.threads} --log {log}"


rule analysis_judged:
    input:
        features="results/analysis/features/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}",
        codes="results/features/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}",
        tokens=tokens_of_model,
        tokenizer=lambda wildcards: plan.tokenizer_of(wildcards.model),
        files=judge_files,
    output:
        directory(
            "results/analysis/judged/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}"
        ),
    log:
        "logs/analysis/judged/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}.log",
    benchmark:
        "logs/analysis/judged/{corpus}/{model}/{variant}/seed_{seed}/layer_{layer}.tsv"
    threads: study.analysis.threads
    resources:
        judge=1,
    params:
        settings=lambda wildcards: as_json(
            held=held_out(wildcards.corpus), judge=study.analysis.judge
        ),
        threads=study.analysis.threads,
        code=code("analysis"),
    shell:
        "universality analysis judge --settings {params.settings:q} --features {input.features}"
        " --codes {input.codes} --tokens {input.tokens} --tokenizer {input.tokenizer} --cache judge_answers"
        " --out {output} --threads {params.threads} --log {log}"


rule analysis_similarity:
    input:
        comparison="results/alignment/{comparison}",
        a=side_values("a"),
        b=side_values("b"),
        rows_a=side_rows("a"),
        rows_b=side_rows("b"),
        measures_a=side_analyses("features", "a"),
        measures_b=side_analyses("features", "b"),
        judged_a=side_analyses("judged", "a"),
        judged_b=side_analyses("judged", "b"),
    output:
        directory("results/analysis/similarity/{comparison}"),
    log:
        "logs/analysis/similarity/{comparison}.log",
    benchmark:
        "logs/analysis/similarity/{comparison}.tsv"
    threads: study.analysis.threads
    params:
        sides=side_flags,
        analyses=analysis_flags,
        settings=similarity_settings,
        threads=study.analysis.threads,
        code=code("analysis"),
    shell:
        "universality analysis similarity --settings {params.settings:q} --comparison {input.comparison}"
        " {params.sides} {params.analyses} --out {output} --threads {params.threads} --log {log}"


rule analysis_idiosyncratic:
    input:
        comparison="results/alignment/{comparison}",
        model=lambda wildcards: f"results/models/{side_of(wildcards).model}",
        saes=lambda wildcards: [
            f"results/saes/{f.path}" for f in plan.side(side_of(wildcards))
        ],
        codes=side_codes,
        measures=lambda wildcards: side_analyses("features", wildcards.side)(wildcards),
        tokens=lambda wildcards: plan.tokens_of(side_of(wildcards).model),
        tokenizer=lambda wildcards: plan.tokenizer_of(side_of(wildcards).model),
    output:
        directory("results/analysis/idiosyncratic/{comparison}/{side}"),
    log:
        "logs/analysis/idiosyncratic/{comparison}/{side}.log",
    benchmark:
        "logs/analysis/idiosyncratic/{comparison}/{side}.tsv"
    threads: study.analysis.threads
    params:
        dictionaries=lambda wildcards, input: [
            *(f"--sae {path}" for path in input.saes),
            *(f"--codes {path}" for path in input.codes),
            *(f"--measures {path}" for path in input.measures),
        ],
        settings=idiosyncratic_settings,
        threads=study.analysis.threads,
        code=code("analysis"),
    shell:
        "universality analysis idiosyncratic --settings {params.settings:q} --comparison {input.comparison}"
        " --model {input.model} {params.dictionaries} --tokens {input.tokens} --tokenizer {input.tokenizer}"
        " --out {output} --threads {params.threads} --log {log}"
