//! An actor that counts, in a process of its own: the smallest whole program.
//!
//! `helio submit target/debug/examples/counter -- 5`

#![allow(clippy::print_stdout, reason = "a driver prints its result")]

use std::time::Duration;

use heliostat::prelude::*;

heliostat::messages! {
    /// Adds, and answers with the sum.
    struct Add(u64) = "add" -> u64;
}

struct Counter {
    value: u64,
}

impl Actor for Counter {
    type Context = Context<Self>;
}

impl RemoteActor for Counter {
    const TYPE: &'static str = "counter";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Add>();
    }
}

impl Spawn for Counter {
    /// The number to begin with.
    type Args = u64;

    async fn create(value: u64, _: ActorCx) -> Result<Self, CreateError> {
        Ok(Self { value })
    }
}

impl Handler<Add> for Counter {
    type Result = u64;

    fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 {
        self.value += n;
        self.value
    }
}

fn main() -> std::process::ExitCode {
    Program::new("counter", env!("CARGO_PKG_VERSION")).actor::<Counter>().run(driver)
}

async fn driver(driver: Driver) -> Result<(), BoxError> {
    let times: u64 = driver.args().first().map_or(Ok(3), |text| text.parse())?;
    let mut spec = ActorSpec::of::<Counter>("counter", &100)?;
    if driver.args().get(1).is_some_and(|word| word == "keep") {
        // It lives on, for other drivers.
        spec.lifetime = Lifetime::Detached;
    }
    let counter: Named<Counter> = driver.cluster().spawn(spec).await?;
    driver.cluster().ready("counter", Duration::from_secs(60)).await?;
    for _ in 0..times {
        println!("{}", counter.ask(Add(1)).await?);
    }
    Ok(())
}
