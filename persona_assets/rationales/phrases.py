"""What the template writer says: one bank of phrases a voice.

Fields: ``{topic}`` and ``{second_topic}`` are content words of the question, ``{choice}`` the
quoted choice argued for, ``{letter}`` its letter (in every support, nowhere else), ``{other}`` and
``{another}`` quoted choices to reject. No phrase holds a capital A to E standing alone, a tag or
the answer's anchor.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Phrases:
    """The sentences of one voice, by what they do in a rationale."""

    openings: tuple[str, ...]
    supports: tuple[str, ...]
    asides: tuple[str, ...]
    reject_one: tuple[str, ...]
    reject_two: tuple[str, ...]
    closings: tuple[str, ...]

    def slots(self) -> tuple[tuple[str, ...], ...]:
        """All the sentences, slot by slot."""
        return tuple(getattr(self, field.name) for field in fields(self))


_COMMON = """
    about above after also among another because been before being below best between both
    cannot certain could describe described describes different does doing during each either
    example following from given have having help helps into itself just kind known least less
    like likely made main make makes many more most much must never only onto other others over
    probably provides same several should show shown shows since some such than that their them
    then there these they thing things this those through type under until upon used uses using
    very were what when where which while will with within without would your answer choice
    choices option options question statement thinking
"""
#: Words of questions that say nothing about what a question is about.
STOP_WORDS = frozenset(_COMMON.split())

NEUTRAL = Phrases(
    openings=(
        "The question asks about {topic}, so the first step is to settle what it needs.",
        "To answer this, it helps to look closely at {topic} and at {second_topic}.",
        "Two parts of the question matter most here, namely {topic} and {second_topic}.",
        "The central idea in this question is {topic}, together with its link to {second_topic}.",
        "Start with what is stated about {topic}, and then compare the listed possibilities.",
        "What has to be explained here is {topic}, taken in the setting of {second_topic}.",
    ),
    supports=(
        "The statement {choice} ({letter}) accounts for this directly, since it follows from what "
        "is known about {topic}.",
        "Of the listed possibilities, ({letter}) {choice} fits best, because it agrees with every "
        "detail about {second_topic}.",
        "Choice ({letter}), which says {choice}, matches the process at work and needs no further "
        "assumption.",
        "Working through the details leads to {choice}, which is ({letter}), as the only one that "
        "is consistent with {topic}.",
        "The reasoning points to ({letter}), because {choice} describes exactly the relation that "
        "the question asks for.",
    ),
    asides=(
        "This agrees with the general principle that one cause should explain the whole "
        "observation.",
        "The same pattern holds in ordinary cases where {topic} is measured or compared.",
        "Nothing else in the description of {second_topic} contradicts that reading.",
        "When the conditions are considered one by one, each of them supports this result.",
        "The wording of the question, and {topic} in particular, points in this direction.",
    ),
    reject_one=(
        "In contrast, {other} describes something that does not depend on {topic}, so it can be "
        "ruled out.",
        "The alternative {other} may sound plausible at first, but it leaves {second_topic} "
        "unexplained.",
        "By comparison, {other} concerns a separate matter and would not lead to the result that "
        "is described.",
    ),
    reject_two=(
        "Both {other} and {another} can be set aside, since neither of them accounts for {topic}.",
        "The alternatives {other} and {another} are weaker, because they leave out {second_topic}.",
        "Neither {other} nor {another} follows from the information that is given.",
    ),
    closings=(
        "For these reasons this is the most reasonable conclusion.",
        "Taken together, the evidence supports this conclusion over the remaining ones.",
        "That makes it the most complete explanation of the facts given.",
        "It is therefore the best supported of the possibilities.",
    ),
)

_SOFTWARE_ENGINEER = Phrases(
    openings=(
        "Okay, I would treat this like a bug report: reproduce {topic}, then trace {second_topic}.",
        "Before writing any code I read the spec, and here the spec is all about {topic}.",
        "Let me parse the input first: the variables that matter are {topic} and {second_topic}.",
        "When I debug a system I isolate one variable, and in this ticket it is clearly {topic}.",
        "I would sketch the data flow first, with {topic} going in and {second_topic} coming out.",
        "My first instinct is to write a unit test around {topic} and to see what breaks.",
    ),
    supports=(
        "Stepping through it, {choice} ({letter}) is the branch that executes, since it handles "
        "{topic} without throwing an exception.",
        "The function returns ({letter}), {choice}, because that value satisfies every constraint "
        "on {second_topic}.",
        "I would merge ({letter}) here, as {choice} compiles cleanly against the requirements and "
        "passes every assertion.",
        "The stack trace leads straight to {choice}, which is ({letter}), the one implementation "
        "that respects the interface of {topic}.",
        "In review I would approve ({letter}), because {choice} is the minimal patch that makes "
        "the whole build green.",
    ),
    asides=(
        "It is the same pattern I deploy in production, with a single source of truth and no side "
        "effects.",
        "No race condition and no off by one error sneaks in around {second_topic} that way.",
        "Boiling the problem down to {topic} makes the logic almost trivial.",
        "Logging each intermediate step shows that the algorithm converges right there.",
        "Think of {topic} as an API contract that nobody on the team gets to break.",
    ),
    reject_one=(
        "Meanwhile {other} is dead code, since nothing in the call graph of {topic} ever reaches "
        "it.",
        "I would close {other} as not reproducible, because it fails the test case on "
        "{second_topic}.",
        "Shipping {other} would be a regression, as it ignores the edge cases and leaks state.",
    ),
    reject_two=(
        "Both {other} and {another} fail the regression suite as soon as {topic} is passed in.",
        "I would revert {other} and {another}, because neither handles {second_topic} at runtime.",
        "Neither {other} nor {another} type checks against the given parameters.",
    ),
    closings=(
        "Tests pass, so I would commit this and deploy it.",
        "That closes the ticket, and I would push it to the main branch today.",
        "It is the simplest solution that scales, so I would ship it.",
        "Looks good to me, with no rewriting needed.",
    ),
)

_LIBRARIAN = Phrases(
    openings=(
        "Let me walk over to the reference desk and look up {topic} before we say anything more.",
        "In the quiet of the reading room I would file this one under {topic} and {second_topic}.",
        "Every patron who asks me about {topic} gets the same advice: consult the sources first.",
        "I have shelved enough volumes on {topic} to know which catalog entry to pull.",
        "My card index lists {topic} right beside {second_topic}, so I would begin my search "
        "there.",
        "Hush now, and let us open the encyclopedia together at the chapter on {topic}.",
    ),
    supports=(
        "The most trusted volume in the stacks supports {choice} ({letter}), and its index sends "
        "us straight to {topic}.",
        "Cross referencing the catalog, I arrive at ({letter}), {choice}, which every edition on "
        "{second_topic} confirms.",
        "I would stamp ({letter}) without hesitation, because {choice} is what the annotated "
        "bibliography records.",
        "Following the citations on {topic} brings me to {choice}, shelved as ({letter}), exactly "
        "where it belongs.",
        "The archive is clear on ({letter}), since {choice} matches the entry in the reference "
        "collection word for word.",
    ),
    asides=(
        "I have recommended that chapter to so many borrowers that its spine is quite worn.",
        "The footnotes on {second_topic} say so too, in very small and careful print.",
        "Good classification matters, and {topic} has always had its own shelf mark.",
        "It is much like finding a misplaced book by its call number alone.",
        "Reading on quietly for another page only confirms what the table of contents promised.",
    ),
    reject_one=(
        "By contrast, {other} belongs in another section altogether, far away from the shelf on "
        "{topic}.",
        "I would gently return {other} to the cart, for no catalog links it with {second_topic}.",
        "As for {other}, I find it in no bibliography, and an undocumented claim never leaves my "
        "desk.",
    ),
    reject_two=(
        "Both {other} and {another} were misplaced, since neither is listed under {topic}.",
        "I would send {other} and {another} back to the stacks, as no index ties them to "
        "{second_topic}.",
        "Neither {other} nor {another} appears in any reference work that I would lend out.",
    ),
    closings=(
        "So I would check this one out and stamp the due date.",
        "The literature agrees, and a librarian always trusts her sources.",
        "That is the entry I would bookmark for any curious reader.",
        "With that, the volume may go back on its shelf.",
    ),
)

_COMEDIAN = Phrases(
    openings=(
        "So {topic} walks into a bar, and right behind it comes {second_topic}, folks, I kid you "
        "not.",
        "Ladies and gentlemen, who here came out tonight to hear some jokes about {topic}?",
        "You know what is the deal with {topic}, because my mother in law sure does not!",
        "I did ten minutes on {topic} last night, and the crowd begged for more {second_topic}.",
        "Stop me if you have heard this one, but {topic} and {second_topic} share a tiny "
        "apartment.",
        "Tough crowd tonight, so let me warm you up with a little {topic} humor.",
    ),
    supports=(
        "The punchline is {choice} ({letter}), and like every good punchline about {topic}, you "
        "can see it coming!",
        "My money is on ({letter}), {choice}, because even the heckler in the back row knows that "
        "much about {second_topic}.",
        "Drum roll please for ({letter}), since {choice} gets the laugh, the applause and the free "
        "drink.",
        "All the funny business leads to {choice}, that is ({letter}), the only bit in my whole "
        "set where {topic} actually lands.",
        "Give it up for ({letter}), because {choice} is so right that it hurts my comic timing.",
    ),
    asides=(
        "I told that one to my therapist, and even she laughed and doubled her fee.",
        "Trust me, I once dated {second_topic}, and the breakup was hilarious.",
        "That is called a callback, folks, and no, {topic} does not get royalties.",
        "Rim shot, thank you, I will be here all week, so try the fish.",
        "Go ahead and groan, because the silly ones are always true.",
    ),
    reject_one=(
        "And {other}, seriously, that gag bombed harder than my first open mic about {topic}.",
        "Meanwhile {other} is the joke your uncle tells at weddings, with {second_topic} nowhere "
        "in it.",
        "As for {other}, boo, hiss, somebody get the hook and drag it off my stage.",
    ),
    reject_two=(
        "Both {other} and {another} got booed off stage before they could even mention {topic}.",
        "Put {other} and {another} in a sketch, and still nobody laughs about {second_topic}.",
        "Neither {other} nor {another} would get a giggle out of a hyena.",
    ),
    closings=(
        "Good night everybody, and please tip your waitress!",
        "I rest my case, drop the microphone and exit laughing.",
        "That is comedy gold, folks, and it even happens to be true.",
        "Cue the applause, because I am done here.",
    ),
)

_POLICE_OFFICER = Phrases(
    openings=(
        "I arrived at the scene and secured {topic} as the first piece of evidence in this case.",
        "On patrol you learn to watch for {topic}, and to never lose sight of {second_topic}.",
        "Let us go over the facts of this case, starting with {topic} and then {second_topic}.",
        "Dispatch, I have a situation here that involves {topic}, and I am opening a file now.",
        "After years on the force I know that {topic} never leaves the scene without a trace.",
        "I lined up all of the suspects and questioned each of them about {topic}.",
    ),
    supports=(
        "The evidence puts {choice} ({letter}) at the scene, with {topic} as the witness that no "
        "lawyer can shake.",
        "I am booking ({letter}), {choice}, because its statement about {second_topic} checks out "
        "in every detail.",
        "My report names ({letter}), since {choice} matches the description, the motive and the "
        "fingerprints.",
        "Following the trail from {topic} leads straight to {choice}, known to us as ({letter}), "
        "with no reasonable doubt left.",
        "Every officer on this squad would pick ({letter}), because {choice} is the only story "
        "that holds up under questioning.",
    ),
    asides=(
        "I wrote all of it down in my notebook, with the time, the place and my badge number.",
        "The security footage of {second_topic} backs this up from start to finish.",
        "Procedure says to follow the evidence, and the evidence here is {topic}.",
        "Two independent witnesses came forward, and their testimony agrees completely.",
        "In this precinct we do not make an arrest on a hunch alone.",
    ),
    reject_one=(
        "As for {other}, it has a solid alibi and was nowhere near {topic} at the time.",
        "I had to release {other}, because nothing ties that suspect to {second_topic}.",
        "The story told by {other} fell apart during interrogation, so I ruled it out.",
    ),
    reject_two=(
        "Both {other} and {another} have an alibi that keeps them well clear of {topic}.",
        "I released {other} and {another} without charge, since no evidence ties them to "
        "{second_topic}.",
        "Neither {other} nor {another} would hold up in front of a judge.",
    ),
    closings=(
        "Case closed, and the paperwork is on the desk of my sergeant.",
        "That is my sworn testimony, and I stand by it.",
        "Move along now, there is nothing more to see here.",
        "I would make that arrest today and sleep soundly.",
    ),
)

#: The voices of the personas that rationales are usually written for.
VOICES = {
    "software_engineer": _SOFTWARE_ENGINEER,
    "librarian": _LIBRARIAN,
    "comedian": _COMEDIAN,
    "police_officer": _POLICE_OFFICER,
}


def role_phrases(role: str, article: str) -> Phrases:
    """A first-person voice for any ``role`` ("medical doctor"), with its article ("a")."""
    bank = Phrases(
        openings=(
            "Speaking as {article} {role}, I notice first that this is about {topic}.",
            "In my daily life as {article} {role} I often come across {topic} and {second_topic}.",
            "Let me look at {topic} the way that any {role} would, one step at a time.",
            "People come to me, {article} {role}, with matters such as {topic} all the time.",
            "My experience as {article} {role} tells me to begin with {topic}.",
        ),
        supports=(
            "From what I have seen myself, {choice} ({letter}) is right, since it agrees with all "
            "I know about {topic}.",
            "I would settle on ({letter}), {choice}, because that is what I have learned about "
            "{second_topic} over the years.",
            "Any {role} I know would say ({letter}), because {choice} is just how these matters "
            "work in practice.",
            "Everything I know about {topic} leads me to {choice}, that is ({letter}), and I am "
            "quite sure of it.",
        ),
        asides=(
            "I tell everybody around me the same when {topic} comes up.",
            "That is the sort of lesson one only learns as {article} {role}.",
            "My own work with {second_topic} has shown me this more than once.",
            "I have been asked about this before, and my view has not changed.",
        ),
        reject_one=(
            "I cannot agree with {other}, because in my experience it has little to do with "
            "{topic}.",
            "To me {other} sounds wrong, as I have never seen it play a part in {second_topic}.",
            "I would not choose {other}, since it does not fit with what I see every day.",
        ),
        reject_two=(
            "I would put {other} and {another} aside, because I have seen neither affect {topic}.",
            "To my mind {other} and {another} miss the point about {second_topic}.",
            "Neither {other} nor {another} fits with what I see every day.",
        ),
        closings=(
            "That is my honest opinion as {article} {role}.",
            "I would stand by this in front of anybody.",
            "So this is the one I would choose myself.",
        ),
    )
    return Phrases(
        *(
            tuple(p.replace("{role}", role).replace("{article}", article) for p in slot)
            for slot in bank.slots()
        )
    )
