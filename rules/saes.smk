# One sparse autoencoder for each model, variant, seed and layer that a comparison asks for.


localrules:
    all_saes,


rule all_saes:
    input:
        [f"results/saes/{features.path}" for features in plan.feature_sets()],


rule saes:
    input:
        unpack(sae_inputs),
    output:
        directory("results/saes/{model}/{variant}/seed_{seed}/layer_{layer}"),
    log:
        "logs/saes/{model}/{variant}/seed_{seed}/layer_{layer}.log",
    benchmark:
        "logs/saes/{model}/{variant}/seed_{seed}/layer_{layer}.tsv"
    threads: study.saes.threads
    params:
        inputs=sae_flags,
        settings=sae_settings,
        threads=study.saes.threads,
        code=code("saes"),
    shell:
        "universality saes train {params.inputs} --model {wildcards.model}"
        " --site resid_post.{wildcards.layer} --seed {wildcards.seed} --settings {params.settings:q}"
        " --out {output} --threads {params.threads} --log {log}"
