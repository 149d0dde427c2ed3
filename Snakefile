from snakemake.utils import min_version

min_version("9.16")


include: "rules/common.smk"
include: "rules/saes_inputs.smk"
include: "rules/alignment_inputs.smk"
include: "rules/analysis_inputs.smk"
include: "rules/corpus.smk"
include: "rules/models.smk"
include: "rules/activations.smk"
include: "rules/saes.smk"
include: "rules/features.smk"
include: "rules/alignment.smk"
include: "rules/circuits.smk"
include: "rules/ablation.smk"
include: "rules/analysis.smk"
include: "rules/report.smk"


onstart:
    print_needs()


localrules:
    all,


rule all:
    default_target: True
    input:
        rules.all_corpus.input,
        rules.all_report.input,
        rules.all_alignment.input,
        rules.all_circuits.input,
        rules.all_ablation.input,
        rules.all_analysis.input,
