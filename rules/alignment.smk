# A comparison of two sets of features: which features of one side have a counterpart in the other? Blocks of layers find
# each other's partners, a job a pair of blocks; one job puts them together.


localrules:
    all_alignment,


rule all_alignment:
    input:
        plan.comparison_folders(),
        "results/alignment/differences.parquet",
        "results/alignment/quality.parquet",
        plan.decoder_tables(),
        plan.space_tables(),


rule alignment_match:
    input:
        a=side_values("a", block="i"),
        b=side_values("b", block="j"),
        rows_a=side_rows("a"),
        rows_b=side_rows("b"),
    output:
        "results/alignment/parts/{comparison}/a{i}_b{j}.safetensors",
    log:
        "logs/alignment/parts/{comparison}/a{i}_b{j}.log",
    benchmark:
        "logs/alignment/parts/{comparison}/a{i}_b{j}.tsv"
    threads: study.alignment.threads
    params:
        sides=side_flags,
        settings=match_settings,
        threads=study.alignment.threads,
        code=code(
            "alignment", "src/universality/alignment/commands.py", module="blocks"
        ),
    shell:
        "universality alignment match --settings {params.settings:q} {params.sides}"
        " --out {output} --threads {params.threads} --log {log}"


rule alignment:
    input:
        parts=lambda wildcards: plan.alignment_parts(wildcards.comparison),
        a=side_values("a"),
        b=side_values("b"),
        rows_a=side_rows("a"),
        rows_b=side_rows("b"),
    output:
        directory("results/alignment/{comparison}"),
    log:
        "logs/alignment/{comparison}.log",
    benchmark:
        "logs/alignment/{comparison}.tsv"
    threads: study.alignment.threads
    params:
        sides=side_flags,
        parts=lambda wildcards, input: [f"--part {part}" for part in input.parts],
        settings=comparison_settings,
        threads=study.alignment.threads,
        code=code("alignment"),
    shell:
        "universality alignment compare --settings {params.settings:q} {params.sides} {params.parts}"
        " --out {output} --threads {params.threads} --log {log}"


rule alignment_tables:
    input:
        comparisons=plan.comparison_folders(),
        saes="results/saes/metrics.parquet",
    output:
        differences="results/alignment/differences.parquet",
        quality="results/alignment/quality.parquet",
    log:
        "logs/alignment/tables.log",
    benchmark:
        "logs/alignment/tables.tsv"
    params:
        comparisons=[f"--comparison {folder}" for folder in plan.comparison_folders()],
        settings=as_json(confidence=study.alignment.statistics.confidence),
        code=code(
            "alignment", "src/universality/alignment/commands.py", module="tables"
        ),
    shell:
        "universality alignment tables --settings {params.settings:q} {params.comparisons} --saes {input.saes}"
        " --differences {output.differences} --quality {output.quality} --log {log}"


rule alignment_decoders:
    input:
        comparison="results/alignment/{comparison}",
        a=side_saes("a"),
        b=side_saes("b"),
    output:
        features="results/alignment/decoders/{comparison}_features.parquet",
        shares="results/alignment/decoders/{comparison}_shares.parquet",
    log:
        "logs/alignment/decoders/{comparison}.log",
    benchmark:
        "logs/alignment/decoders/{comparison}.tsv"
    threads: study.alignment.threads
    params:
        saes=lambda wildcards, input: [
            *(f"--a {path}" for path in input.a),
            *(f"--b {path}" for path in input.b),
        ],
        settings=as_json(
            partners=study.alignment.matching.partners,
            statistics=study.alignment.statistics,
        ),
        threads=study.alignment.threads,
        code=code(
            "alignment", "src/universality/alignment/commands.py", module="decoders"
        ),
    shell:
        "universality alignment decoders --settings {params.settings:q} --comparison {input.comparison} {params.saes}"
        " --features {output.features} --shares {output.shares} --threads {params.threads} --log {log}"


rule alignment_spaces:
    input:
        a=side_residuals("a"),
        b=side_residuals("b"),
        rows_a=side_rows("a"),
        rows_b=side_rows("b"),
    output:
        "results/alignment/spaces/{comparison}.parquet",
    log:
        "logs/alignment/spaces/{comparison}.log",
    benchmark:
        "logs/alignment/spaces/{comparison}.tsv"
    threads: study.alignment.threads
    params:
        sides=side_flags,
        settings=spaces_settings,
        threads=study.alignment.threads,
        code=code(
            "alignment", "src/universality/alignment/commands.py", module="spaces"
        ),
    shell:
        "universality alignment spaces --settings {params.settings:q} {params.sides}"
        " --out {output} --threads {params.threads} --log {log}"
