# Text to token sequences: documents, tokenizers, and the tokens that each makes of all documents.


localrules:
    all_corpus_tokenizer,
    all_corpus_tokens,
    all_corpus,


rule all_corpus_tokenizer:
    input:
        expand("results/corpus/{tokenizer}", tokenizer=plan.tokenizers()),


rule all_corpus_tokens:
    input:
        expand("results/corpus/{tokens}", tokens=plan.tokens()),


rule all_corpus:
    input:
        rules.all_corpus_tokens.input,


rule corpus_documents:
    input:
        corpus_files,
    output:
        "results/corpus/documents.parquet",
    log:
        "logs/corpus/documents.log",
    benchmark:
        "logs/corpus/documents.tsv"
    params:
        settings=section(study.corpus.documents),
        code=code("corpus"),
    shell:
        "universality corpus documents --settings {params.settings:q} --out {output} --log {log}"


rule corpus_tokenizer:
    input:
        tokenizer_files,
        documents="results/corpus/documents.parquet",
    output:
        directory("results/corpus/{tokenizer}"),
    log:
        "logs/corpus/{tokenizer}.log",
    benchmark:
        "logs/corpus/{tokenizer}.tsv"
    params:
        settings=tokenizer_settings,
        code=code("corpus"),
    shell:
        "universality corpus tokenizer --settings {params.settings:q} --documents {input.documents}"
        " --out {output} --log {log}"


rule corpus_tokens:
    input:
        documents="results/corpus/documents.parquet",
        tokenizer=lambda wildcards: f"results/corpus/{plan.tokens()[wildcards.tokens]}",
    output:
        directory("results/corpus/{tokens}"),
    log:
        "logs/corpus/{tokens}.log",
    benchmark:
        "logs/corpus/{tokens}.tsv"
    params:
        length=study.corpus.sequence_length,
        code=code("corpus"),
    shell:
        "universality corpus tokens --documents {input.documents} --tokenizer {input.tokenizer}"
        " --sequence-length {params.length} --out {output} --log {log}"
