//! `helio`.
mod config;
fn main() {
    let _ = config::Config::load(None);
    print!("{}", config::reference_page());
}
