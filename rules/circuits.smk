# Which components carry induction: path patching for every trained model, the off-by-one profile for Mamba.


localrules:
    all_circuits,


rule all_circuits:
    input:
        expand(
            "results/circuits/induction_{model}.parquet",
            model=plan.circuit_models(),
        ),
        expand(
            "results/circuits/off_by_one_{model}.parquet",
            model=plan.state_space_models(),
        ),


rule circuits:
    input:
        model="results/models/{model}",
        tokens=lambda wildcards: plan.tokens_of(wildcards.model),
    output:
        "results/circuits/{task}_{model}.parquet",
    log:
        "logs/circuits/{task}_{model}.log",
    benchmark:
        "logs/circuits/{task}_{model}.tsv"
    wildcard_constraints:
        task="induction|off_by_one",
    threads: study.circuits.threads
    params:
        command=lambda wildcards: wildcards.task.replace("_", "-"),
        settings=section(study.circuits),
        threads=study.circuits.threads,
        code=code("circuits"),
    shell:
        "universality circuits {params.command} --model {input.model} --tokens {input.tokens}"
        " --settings {params.settings:q} --out {output} --threads {params.threads} --log {log}"
