# Which components do a task, in every model that was trained or loaded: a job for each task and model.


localrules:
    all_circuits,


rule all_circuits:
    input:
        plan.circuits(),
        plan.circuit_similarities(),
        plan.published_circuits(),


rule circuits:
    input:
        model="results/models/{model}",
        tokens=lambda wildcards: plan.tokens_of(wildcards.model),
        tokenizer=lambda wildcards: plan.tokenizer_of(wildcards.model),
    output:
        directory("results/circuits/{task}/{model}"),
    log:
        "logs/circuits/{task}/{model}.log",
    benchmark:
        "logs/circuits/{task}/{model}.tsv"
    threads: study.circuits.threads
    params:
        settings=task_settings,
        threads=study.circuits.threads,
        code=code("circuits"),
    shell:
        "universality circuits analyse --model {input.model} --tokens {input.tokens} --tokenizer {input.tokenizer}"
        " --settings {params.settings:q} --out {output} --threads {params.threads} --log {log}"


rule circuits_similarity:
    input:
        lambda wildcards: plan.circuits(wildcards.task),
    output:
        "results/circuits/similarity/{task}.parquet",
    log:
        "logs/circuits/similarity/{task}.log",
    benchmark:
        "logs/circuits/similarity/{task}.tsv"
    params:
        graphs=lambda wildcards, input: [f"--graph {path}/graph.json" for path in input],
        code=code("circuits"),
    shell:
        "universality circuits similarity {params.graphs} --out {output} --log {log}"


rule circuits_published:
    input:
        plan.circuits(published=True),
    output:
        "results/circuits/published.parquet",
    log:
        "logs/circuits/published.log",
    benchmark:
        "logs/circuits/published.tsv"
    params:
        circuits=lambda wildcards, input: [f"--circuit {path}" for path in input],
        settings=as_json(
            published=[p.model_dump(mode="json") for p in study.circuits.published]
        ),
        code=code("circuits"),
    shell:
        "universality circuits published --settings {params.settings:q} {params.circuits} --out {output} --log {log}"
