# One comparison of two sets of features a job: which features of one side have a counterpart in the other?


localrules:
    all_alignment,


rule all_alignment:
    input:
        expand(
            "results/alignment/{comparison}.parquet",
            comparison=study.alignment.comparisons,
        ),


rule alignment:
    input:
        a=side_values("a"),
        b=side_values("b"),
        rows_a=side_rows("a"),
        rows_b=side_rows("b"),
    output:
        table="results/alignment/{comparison}.parquet",
        summary="results/alignment/{comparison}.json",
    log:
        "logs/alignment/{comparison}.log",
    benchmark:
        "logs/alignment/{comparison}.tsv"
    threads: study.alignment.threads
    params:
        sides=side_flags,
        settings=comparison_settings,
        threads=study.alignment.threads,
        code=code("alignment"),
    shell:
        "universality alignment compare --settings {params.settings:q} {params.sides}"
        " --out {output.table} --summary {output.summary} --threads {params.threads} --log {log}"
