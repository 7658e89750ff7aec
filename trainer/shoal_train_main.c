/*
 * shoal-train: trains adapters, models and vocabularies, measures losses, and does a node's round
 * of training. Thin: the work is in trainer.h, dataset.h and tokenizer_train.h; each command is a
 * file of its own (commands.h), and what the commands have in common is in program.h.
 */
#include <stdio.h>
#include <string.h>

#include "shared/base/log.h"
#include "trainer/commands.h"
#include "trainer/program.h"

static const struct {
    const char *name;
    const sh_command *command;
    sh_status (*run)(int argc, char **argv, sh_error *err);
} commands[] = {
    {"lora", &sh_lora_command, sh_lora_main},
    {"full", &sh_full_command, sh_full_main},
    {"distill", &sh_distill_command, sh_distill_main},
    {"tokenizer", &sh_tokenizer_train_command, sh_tokenizer_train_main},
    {"eval", &sh_eval_command, sh_eval_main},
    {"round", &sh_round_command, sh_round_main},
};

static void print_help(const sh_command *command)
{
    sh_buf text;
    sh_buf_init(&text, 1u << 20);
    if (sh_options_help(command, &text) == SH_OK)
        fwrite(text.data, 1, text.len, stdout);
    sh_buf_release(&text);
}

static bool asks_for_help(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0)
            return true;
    return false;
}

int main(int argc, char **argv)
{
    sh_error err = {0};
    for (size_t i = 0; argc > 1 && i < SH_COUNT(commands); i++) {
        if (strcmp(argv[1], commands[i].name) != 0)
            continue;
        if (asks_for_help(argc - 1, argv + 1)) {
            print_help(commands[i].command);
            return 0;
        }
        sh_status status = sh_crypto_init(&err);
        if (status == SH_OK)
            status = commands[i].run(argc - 1, argv + 1, &err);
        return status == SH_OK ? 0 : sh_error_report(TP_PROGRAM, &err);
    }
    bool help = argc > 1 && asks_for_help(argc, argv);
    fprintf(help ? stdout : stderr,
            "usage: " TP_PROGRAM " lora|full|distill|tokenizer|eval|round [OPTIONS]; "
            "'" TP_PROGRAM " lora --help' lists the options of one\n");
    return help ? 0 : 2;
}
