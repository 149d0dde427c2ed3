# Which components do a task: path patching, off-by-one profiles, cuts, graphs and attribution, of every trained model.


localrules:
    all_circuits,


rule all_circuits:
    input:
        plan.circuit_tables(),


rule circuits_paths:
    input:
        unpack(circuit_inputs),
    output:
        "results/circuits/{task}/{model}/paths.parquet",
    log:
        "logs/circuits/{task}/{model}/paths.log",
    benchmark:
        "logs/circuits/{task}/{model}/paths.tsv"
    threads: study.circuits.threads
    params:
        settings=task_settings,
        threads=study.circuits.threads,
        code=code("circuits"),
    shell:
        "universality circuits paths --model {input.model} --tokens {input.tokens} --tokenizer {input.tokenizer}"
        " --settings {params.settings:q} --out {output} --threads {params.threads} --log {log}"


rule circuits_routes:
    input:
        unpack(circuit_inputs),
    output:
        off_by_one="results/circuits/{task}/{model}/off_by_one.parquet",
        mixing="results/circuits/{task}/{model}/mixing.parquet",
        graph="results/circuits/{task}/{model}/graph.json",
    log:
        "logs/circuits/{task}/{model}/routes.log",
    benchmark:
        "logs/circuits/{task}/{model}/routes.tsv"
    threads: study.circuits.threads
    params:
        settings=task_settings,
        threads=study.circuits.threads,
        code=code("circuits"),
    shell:
        "universality circuits routes --model {input.model} --tokens {input.tokens} --tokenizer {input.tokenizer}"
        " --settings {params.settings:q} --off-by-one {output.off_by_one} --mixing {output.mixing}"
        " --graph {output.graph} --threads {params.threads} --log {log}"


rule circuits_attribution:
    input:
        unpack(circuit_inputs),
    output:
        scores="results/circuits/{task}/{model}/attribution.parquet",
        curves="results/circuits/{task}/{model}/curves.parquet",
    log:
        "logs/circuits/{task}/{model}/attribution.log",
    benchmark:
        "logs/circuits/{task}/{model}/attribution.tsv"
    threads: study.circuits.threads
    params:
        settings=attribution_settings,
        threads=study.circuits.threads,
        code=code("circuits"),
    shell:
        "universality circuits attribution --model {input.model} --tokens {input.tokens} --tokenizer {input.tokenizer}"
        " --settings {params.settings:q} --scores {output.scores} --curves {output.curves}"
        " --threads {params.threads} --log {log}"


rule circuits_similarity:
    input:
        lambda wildcards: plan.graphs(wildcards.task),
    output:
        "results/circuits/{task}/similarity.parquet",
    log:
        "logs/circuits/{task}/similarity.log",
    benchmark:
        "logs/circuits/{task}/similarity.tsv"
    params:
        graphs=lambda wildcards, input: [f"--graph {path}" for path in input],
        code=code("circuits"),
    shell:
        "universality circuits similarity {params.graphs} --out {output} --log {log}"
