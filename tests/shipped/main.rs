//! What is shipped beside the programs: configuration files, hooks, documents and licences. Sanitizers find nothing here.

mod access_policies;
mod commands;
mod configs;
mod documents;
mod install;
mod manual;
mod monitoring;
mod protocol;
mod rerun_failed;
mod revision;
mod schema;
mod snapshot_hooks;
mod supply_chain;
