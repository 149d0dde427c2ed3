# All measurements in one file of metrics, and one page with the figures.


localrules:
    all_report,


rule all_report:
    input:
        "results/report",
        "results/metrics.json",


rule report:
    input:
        models=rules.all_models.input,
        saes=["results/saes/metrics.parquet"],
        crosscoders=plan.crosscoder_tables(),
        alignment=plan.comparison_folders(),
        decoders=plan.decoder_tables("shares"),
        spaces=plan.space_tables(),
        circuits=plan.circuits(),
        similarity=plan.circuit_similarities(),
        published=plan.published_circuits(),
        ablation=plan.ablations(),
        kinds=plan.similarities(),
        idiosyncratic=plan.idiosyncratic(),
    output:
        page=directory("results/report"),
        metrics="results/metrics.json",
    log:
        "logs/report/report.log",
    benchmark:
        "logs/report/report.tsv"
    threads: study.report.threads
    params:
        inputs=lambda wildcards, input: [
            f"--{kind} {path}"
            for kind in (
                "models",
                "saes",
                "crosscoders",
                "alignment",
                "decoders",
                "spaces",
                "circuits",
                "similarity",
                "published",
                "ablation",
                "kinds",
                "idiosyncratic",
            )
            for path in getattr(input, kind)
        ],
        settings=section(study.report),
        threads=study.report.threads,
        code=code("report", "src/universality/report/page.html.j2"),
    shell:
        "universality report build --settings {params.settings:q} {params.inputs}"
        " --metrics {output.metrics} --out {output.page} --threads {params.threads} --log {log}"
