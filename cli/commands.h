#ifndef KVSWEEP_CLI_COMMANDS_H_
#define KVSWEEP_CLI_COMMANDS_H_

// The commands of `kvsweep`, one file each. A command adds itself to the command line: name, flags,
// an example. When it was chosen and its flags are sound, parsing runs it, and its exit code
// (cli/exit_code.h) is left in `*exit_code`. Results go to stdout, all else to stderr.

namespace CLI {
class App;
}

namespace kvsweep {

void AddSpecCommand(CLI::App& app, int* exit_code);
void AddValidateCommand(CLI::App& app, int* exit_code);
void AddExpandCommand(CLI::App& app, int* exit_code);
void AddRunCommand(CLI::App& app, int* exit_code);
void AddGenerateCommand(CLI::App& app, int* exit_code);
void AddSubmitCommand(CLI::App& app, int* exit_code);
void AddWatchCommand(CLI::App& app, int* exit_code);
void AddCancelCommand(CLI::App& app, int* exit_code);
void AddWorkersCommand(CLI::App& app, int* exit_code);
void AddListCommand(CLI::App& app, int* exit_code);
void AddShowCommand(CLI::App& app, int* exit_code);
void AddLogsCommand(CLI::App& app, int* exit_code);
void AddQueryCommand(CLI::App& app, int* exit_code);
void AddCompareCommand(CLI::App& app, int* exit_code);

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_COMMANDS_H_
