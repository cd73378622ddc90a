//! What the controller tells and asks replicas that are actors of users: their settings first, then their health.
//!
//! Pure: who lives, the time and what was answered come in; what is to be asked, and how a replica is, go out.
//! AP-1: a replica that has not taken its settings, and passed a check, since it was started gets no request.

use std::collections::BTreeMap;
use std::time::Duration;

use heliostat_runtime::handle::ActorAddr;

use super::core::Health;
use super::workload::ActorDeployment;

/// Checks in a row that may fail before a replica is replaced, as in Ray.
const FAILURES_MAX: u32 = 3;
/// From a check that failed to the next, at most.
const AGAIN: Duration = Duration::from_secs(1);

/// All replicas that live.
#[derive(Debug, Default)]
pub(super) struct Probes(BTreeMap<u64, Probe>);

/// What is to be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// To take these settings.
    Configure(String),
    /// How it is.
    Check,
}

/// What became of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The replica at this address is fine with it.
    Fine(ActorAddr),
    /// It says no, in its words.
    No(String),
    /// It gave no answer.
    None(String),
}

#[derive(Debug, Default)]
struct Probe {
    incarnation: u64,
    addr: Option<ActorAddr>,
    /// The settings that it has taken last.
    configured: Option<String>,
    /// Settings that it did not take, and why.
    refused: Option<(String, String)>,
    asking: bool,
    checked: bool,
    /// When it is asked next for its health.
    due: Duration,
    failures: u32,
    trouble: String,
}

impl Probes {
    /// These live, by number and incarnation, and no others.
    pub(super) fn set_living(&mut self, living: &BTreeMap<u64, u64>) {
        self.0.retain(|number, probe| living.get(number) == Some(&probe.incarnation));
        for (&number, &incarnation) in living {
            self.0.entry(number).or_insert_with(|| Probe { incarnation, ..Probe::default() });
        }
    }

    /// What is to be asked of a replica now, and in which incarnation. Its answer comes by [`Self::told`].
    pub(super) fn ask(
        &mut self,
        number: u64,
        wanted: &ActorDeployment,
        now: Duration,
    ) -> Option<(u64, Question)> {
        let probe = self.0.get_mut(&number).filter(|probe| !probe.asking)?;
        let question = match &wanted.user_config {
            Some(config) if probe.must_take(config) => Question::Configure(config.clone()),
            _ if probe.refused.is_some() && probe.configured.is_none() => return None,
            _ if now >= probe.due => Question::Check,
            _ => return None,
        };
        probe.asking = true;
        Some((probe.incarnation, question))
    }

    /// What was answered.
    pub(super) fn told(
        &mut self,
        (number, incarnation): (u64, u64),
        question: Question,
        answer: Answer,
        (now, period): (Duration, Duration),
    ) {
        let Some(probe) = self.0.get_mut(&number).filter(|probe| probe.incarnation == incarnation) else {
            return;
        };
        probe.asking = false;
        match (question, answer) {
            (Question::Configure(config), Answer::Fine(addr)) => {
                (probe.addr, probe.configured, probe.refused) = (Some(addr), Some(config), None);
            }
            (Question::Configure(config), Answer::No(why)) => probe.refused = Some((config, why)),
            (Question::Check, Answer::Fine(addr)) => {
                (probe.addr, probe.checked, probe.failures) = (Some(addr), true, 0);
                probe.due = now + period;
            }
            (Question::Check, Answer::No(why) | Answer::None(why))
            | (Question::Configure(_), Answer::None(why)) => {
                (probe.failures, probe.trouble) = (probe.failures + 1, why);
                probe.due = now + period.min(AGAIN);
            }
        }
    }

    /// How a replica is that lives, as far as it was asked.
    pub(super) fn health(&self, number: u64, wanted: &ActorDeployment) -> Health {
        let Some(probe) = self.0.get(&number) else {
            return Health::Starting("it has not been asked yet".to_owned());
        };
        if probe.failures >= FAILURES_MAX {
            return Health::Broken(format!("it failed {FAILURES_MAX} checks in a row: {}", probe.trouble));
        }
        let refused =
            probe.refused.as_ref().filter(|(config, _)| wanted.user_config.as_ref() == Some(config));
        match refused {
            Some((_, why)) if probe.configured.is_none() => {
                return Health::Broken(format!("it does not take its user_config: {why}"));
            }
            // It serves on as it was.
            Some((_, why)) => {
                return Health::Ailing(format!("it does not take its new user_config: {why}"));
            }
            None => {}
        }
        match &wanted.user_config {
            Some(config) if probe.configured.as_ref() != Some(config) => {
                Health::Starting("its user_config is on its way".to_owned())
            }
            _ if !probe.checked => Health::Starting("its first health check is on its way".to_owned()),
            _ => Health::Ready,
        }
    }

    /// Where requests reach a replica; none while it may not have any.
    pub(super) fn addr(&self, number: u64, wanted: &ActorDeployment) -> Option<&ActorAddr> {
        let probe = self.0.get(&number)?;
        let configured = wanted.user_config.is_none() || probe.configured.is_some();
        probe.addr.as_ref().filter(|_| configured && probe.checked)
    }
}

impl Probe {
    fn must_take(&self, config: &String) -> bool {
        let refused = self.refused.as_ref().is_some_and(|(refused, _)| refused == config);
        self.configured.as_ref() != Some(config) && !refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::core::test_actor;
    use heliostat_runtime::handle::{ActorId, Incarnation, ProcessId};

    const PERIOD: Duration = Duration::from_secs(10);

    fn addr() -> ActorAddr {
        ActorAddr {
            actor: ActorId(7),
            incarnation: Incarnation(1),
            endpoint: "127.0.0.1:1".to_owned(),
            process: ProcessId(1),
        }
    }

    fn wanted(config: Option<&str>) -> ActorDeployment {
        ActorDeployment { user_config: config.map(str::to_owned), ..test_actor("a", 1) }
    }

    fn configure(config: &str) -> Question {
        Question::Configure(config.to_owned())
    }

    struct Rig {
        probes: Probes,
        now: Duration,
    }

    impl Rig {
        fn living(incarnation: u64) -> Self {
            let mut probes = Probes::default();
            probes.set_living(&BTreeMap::from([(1, incarnation)]));
            Self { probes, now: Duration::ZERO }
        }

        /// Asks, expects that question, and answers it.
        fn answer(&mut self, wanted: &ActorDeployment, expected: Question, answer: Answer) {
            let (incarnation, question) = self.probes.ask(1, wanted, self.now).unwrap();
            assert_eq!(question, expected);
            assert_eq!(self.probes.ask(1, wanted, self.now), None, "one question at a time");
            self.probes.told((1, incarnation), question, answer, (self.now, PERIOD));
        }
    }

    #[test]
    fn settings_come_first_and_a_check_before_the_first_request() {
        let (mut rig, wanted) = (Rig::living(1), wanted(Some("1")));
        rig.answer(&wanted, configure("1"), Answer::Fine(addr()));
        assert_eq!(rig.probes.addr(1, &wanted), None);
        rig.answer(&wanted, Question::Check, Answer::Fine(addr()));
        assert_eq!(rig.probes.health(1, &wanted), Health::Ready);
        assert_eq!(rig.probes.addr(1, &wanted), Some(&addr()));
        assert_eq!(rig.probes.ask(1, &wanted, rig.now), None);
        rig.now += PERIOD;
        rig.answer(&wanted, Question::Check, Answer::Fine(addr()));
        // What was started anew begins anew.
        rig.probes.set_living(&BTreeMap::from([(1, 2)]));
        assert_eq!(rig.probes.addr(1, &wanted), None);
        rig.answer(&wanted, configure("1"), Answer::Fine(addr()));
    }

    #[test]
    fn settings_that_are_refused_cost_a_new_replica_but_not_one_that_serves() {
        let (mut rig, first, second) = (Rig::living(1), wanted(Some("1")), wanted(Some("2")));
        rig.answer(&first, configure("1"), Answer::No("odd".to_owned()));
        assert!(matches!(rig.probes.health(1, &first), Health::Broken(why) if why.contains("odd")));
        let mut rig = Rig::living(1);
        rig.answer(&first, configure("1"), Answer::Fine(addr()));
        rig.answer(&first, Question::Check, Answer::Fine(addr()));
        rig.answer(&second, configure("2"), Answer::No("odd".to_owned()));
        assert!(matches!(rig.probes.health(1, &second), Health::Ailing(why) if why.contains("odd")));
        assert!(rig.probes.addr(1, &second).is_some());
        assert_eq!(rig.probes.ask(1, &second, rig.now), None, "it is told once");
    }

    #[test]
    fn three_checks_in_a_row_must_fail() {
        let (mut rig, wanted) = (Rig::living(1), wanted(None));
        rig.answer(&wanted, Question::Check, Answer::Fine(addr()));
        rig.now += PERIOD;
        for _ in 0..2 {
            rig.answer(&wanted, Question::Check, Answer::None("late".to_owned()));
            rig.now += AGAIN;
        }
        assert_eq!(rig.probes.health(1, &wanted), Health::Ready);
        rig.answer(&wanted, Question::Check, Answer::No("ill".to_owned()));
        assert!(matches!(rig.probes.health(1, &wanted), Health::Broken(why) if why.contains("ill")));
    }
}
