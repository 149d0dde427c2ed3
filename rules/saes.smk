# Sparse autoencoders, transcoders and crosscoders, and how well each does on held-out documents. Trained from the store,
# each is a job of its own; from running models, all that reads the same sites is one job and one pass, so each such
# group has a rule of its own.


localrules:
    all_saes,


rule all_saes:
    input:
        [f"results/saes/{dictionary.path}" for dictionary in plan.dictionaries()],
        "results/saes/metrics.parquet",


for jobs in plan.dictionary_jobs():

    rule:
        name:
            jobs.rule
        input:
            unpack(dictionary_inputs(jobs)),
        output:
            [
                directory(f"results/saes/{path}")
                for path in [member.path for member in jobs.members]
                or ["{dictionary}"]
            ],
        log:
            f"logs/saes/{jobs.rule if jobs.members else '{dictionary}'}.log",
        benchmark:
            f"logs/saes/{jobs.rule if jobs.members else '{dictionary}'}.tsv"
        threads: study.saes.threads
        params:
            inputs=dictionary_flags(jobs),
            outs=lambda wildcards, output: [f"--out {path}" for path in output],
            settings=dictionary_settings(jobs),
            checkpoint=f"checkpoints/saes/{jobs.rule if jobs.members else '{dictionary}'}.pt",
            threads=study.saes.threads,
            code=code("saes"),
        shell:
            "universality saes train {params.inputs} --settings {params.settings:q} {params.outs}"
            " --checkpoint {params.checkpoint} --on-mismatch restart --threads {params.threads} --log {log}"


rule saes_evaluation:
    input:
        saes=evaluated_saes,
        activations=evaluated_shards,
        models=evaluated_models,
        tokens=lambda wildcards: tokens_of_all(evaluated(wildcards)),
    output:
        metrics="results/saes/{evaluation}.json",
    log:
        "logs/saes/{evaluation}.log",
    benchmark:
        "logs/saes/{evaluation}.tsv"
    threads: study.saes.threads
    params:
        inputs=evaluation_flags,
        settings=evaluation_settings,
        threads=study.saes.threads,
        code=code("saes", module="evaluation_commands"),
    shell:
        "universality saes evaluate {params.inputs} --tokens {input.tokens} --settings {params.settings:q}"
        " --out {output.metrics} --threads {params.threads} --log {log}"


# An evaluation of a crosscoder writes a table of its features too, so it has a rule of its own.
use rule saes_evaluation as saes_evaluation_of_crosscoder with:
    output:
        metrics="results/saes/{crosscoder}.json",
        features="results/saes/{crosscoder}.features.parquet",
    log:
        "logs/saes/{crosscoder}.evaluation.log",
    benchmark:
        "logs/saes/{crosscoder}.evaluation.tsv"


rule saes_metrics:
    input:
        [f"results/saes/{evaluation}.json" for evaluation in plan.evaluations()],
    output:
        "results/saes/metrics.parquet",
    log:
        "logs/saes/metrics.log",
    benchmark:
        "logs/saes/metrics.tsv"
    params:
        evaluations=lambda wildcards, input: [f"--evaluation {path}" for path in input],
        code=code("saes", module="evaluation_commands"),
    shell:
        "universality saes gather {params.evaluations} --out {output} --log {log}"
